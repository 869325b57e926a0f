"""What a circuit means: the masked model, the fills of cut parts, and how far they are off."""
