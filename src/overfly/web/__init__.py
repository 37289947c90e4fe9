"""The web server: pages and an HTTP API."""
