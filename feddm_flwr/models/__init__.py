"""Networks, the diffusion process, and the diffusers pipelines that come of a run."""
