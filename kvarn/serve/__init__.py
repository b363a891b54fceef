"""The server: an API process (HTTP) and an engine process, joined by one socket."""
