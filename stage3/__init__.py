"""Modules of stage 3 that are not its story: the message, who can read one, and the direct receiver."""
