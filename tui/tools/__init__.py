"""The tools that a model may call, and the consent of its user.

Owns the four tools of qchat's own, the servers of the Model Context Protocol, and the bounds of all results.
Knows neither an engine nor a front end: whoever shows a chat is asked through a function. Imports `mcp` only
to start a server.
"""
