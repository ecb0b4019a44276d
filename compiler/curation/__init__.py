"""The search for registers: what is sensitive, what helps, what is certain."""
