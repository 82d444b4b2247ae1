"""``gradaccum demo``: one task trained three ways, and how far each ends up from the whole batch. See README.md."""
