"""The version of this library."""

VERSION = "0.15.0"
