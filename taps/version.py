"""The version of this library."""

VERSION = "0.18.0"
