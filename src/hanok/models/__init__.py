"""One file a family: a frozen Config, build(config), PRESETS, and the table that translates it to the outer world."""
