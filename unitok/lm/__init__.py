"""Language models: expand them with image codes, adapt them, export them."""
