"""What each source sends, as events: one pure function a source."""
