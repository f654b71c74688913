"""What the user supplies, checked before anything is computed."""
