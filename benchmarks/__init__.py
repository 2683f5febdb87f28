"""Programs that measure the extension; run them from the root of the repository."""
