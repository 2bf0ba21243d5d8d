"""What differential privacy costs, and the ledger of what a node has spent. No torch."""
