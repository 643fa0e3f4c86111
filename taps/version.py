"""The version of this library."""

VERSION = "0.12.0"
