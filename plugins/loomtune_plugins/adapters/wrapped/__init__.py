"""What the methods of peft that wrap layers share."""
