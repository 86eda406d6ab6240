"""Model folders: quantised, published, hostile. What opens one, converts one and says what one is."""
