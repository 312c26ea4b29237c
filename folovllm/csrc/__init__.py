"""C++ operators of the fast CPU path, and the module that builds them.

Milestone: M4. vLLM counterpart: csrc/cpu/.
"""
