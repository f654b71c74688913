"""Quality and time of our recipes beside those of other tools."""
