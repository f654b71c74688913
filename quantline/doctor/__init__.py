"""What a project needs: packages, a fresh configuration, and memory, disk and time for its run."""
