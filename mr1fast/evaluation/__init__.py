"""How good is it: accuracies, and the tables, pages and pictures that show them."""
