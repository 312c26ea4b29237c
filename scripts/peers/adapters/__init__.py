"""Stand-alone files that run in a peer's own virtual environment: they import the standard library and the peer.

Milestone: M4. vLLM counterpart: none. Each is called as `python FILE TASK.json RESULT.json` (peer_process.py says what
is in them) and finds peer_process.py because Python puts a script's folder on the path.
"""
