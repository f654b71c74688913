"""What every bundle has, whatever its container: manifest, README, and checks of its content."""
