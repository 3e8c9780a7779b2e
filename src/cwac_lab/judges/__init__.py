"""Judges of answers to prompts."""
