"""Requests, sampling parameters and results: plain data, no torch."""

from dataclasses import dataclass, field
