"""Documents, sources, token shards, rendering and packing. Import the module you need; nothing is imported here."""
