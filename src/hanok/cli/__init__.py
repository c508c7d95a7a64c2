"""All wiring; one file a verb."""
