"""The version of this library."""

VERSION = "0.17.0"
