"""Work that a stage divides among workers, on this machine or on others."""
