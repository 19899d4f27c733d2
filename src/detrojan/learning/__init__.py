"""What trains, measures and meters a network, for stages, attacks and defenses alike."""
