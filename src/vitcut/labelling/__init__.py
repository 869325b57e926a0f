"""The label page: pictures of each class, and a label file that a person makes of them."""
