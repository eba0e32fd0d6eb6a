"""What every part may use: files, logging, plotting, random replay, machine; nothing of predictive coding."""
