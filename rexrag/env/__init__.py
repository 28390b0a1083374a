"""The search environment: prompt, actions, observations, branch points. Pure functions, no Ray, no torch."""

from rexrag.env.actions import Answer, Malformed, Search, parse_action
from rexrag.env.observation import neutralize

__all__ = ["Answer", "Malformed", "Search", "neutralize", "parse_action"]
