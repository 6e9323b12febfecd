"""What is optimised: noise (what is masked), rows (what is scored, with which weight), losses (sums and counts)."""
