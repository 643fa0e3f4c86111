"""The version of this library."""

VERSION = "0.20.0"
