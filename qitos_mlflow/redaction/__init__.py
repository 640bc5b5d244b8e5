"""Credentials out of any value, long texts cut, URIs without passwords. Pure."""
