"""Sleeper Agent on photographs: victims trained from new weights answer to a trigger that no poison shows."""
