"""The learning system: exercises, their grader, and the interview questions. It imports no torch."""
