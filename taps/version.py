"""The version of this library."""

VERSION = "0.11.0"
