"""The measured cases: what is computed, by whom, which floor holds, and how each answer is judged."""
