"""What a terminal shows, and sheets of images."""
