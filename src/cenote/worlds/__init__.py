"""Small generated worlds, and the networks trained on them in minutes, in which a claim can be watched."""
