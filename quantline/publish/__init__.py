"""Publishing bundles: the card with the figures, the folder that is uploaded, and the Hub."""
