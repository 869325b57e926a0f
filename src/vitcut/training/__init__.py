"""Training: recipes, augmentation and the one loop that trains, fine-tunes and retrains."""
