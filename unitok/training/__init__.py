"""Training engines, one for each kind of model. Import the module you need; nothing is imported here."""
