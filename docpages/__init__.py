"""What makes and checks the documentation: generated pages, executed pages, result tables."""
