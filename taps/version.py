"""The version of this library."""

VERSION = "0.23.0"
