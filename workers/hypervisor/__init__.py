"""The seam to what runs virtual machines: `port` says what is asked of it; a driver answers."""
