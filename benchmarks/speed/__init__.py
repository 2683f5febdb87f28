"""Speed and memory of nystrom_attention beside what a user could pick instead."""
