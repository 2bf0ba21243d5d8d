"""FedDM on Flower: train diffusers U-Nets across sites that keep their images."""

__version__ = "0.1.0"
