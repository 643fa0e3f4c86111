"""The version of this library."""

VERSION = "0.13.0"
