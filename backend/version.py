"""The version that pictures bear and the page shows."""

VERSION = "0.1.0"
