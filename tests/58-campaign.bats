# The crash campaign: the listener killed, its calls failing, the line cut, the power
# gone, at some hundred places of all stores; and whether a fault would be noticed.
# shellcheck disable=SC2154 # lib.bash has variables
load lib

campaign() { /usr/bin/python3 "$top/tests/tools/campaign" "$@"; }

@test "wherever it breaks, nothing is lost, nothing stored twice, nothing wrongly reported" {
	campaign --program "$BSMTP" --small
}

# This tries out the campaign itself; a sanitized program cannot have the faults.
@test "a sync that is left out is noticed: of the mail, of what stands beside it, of folders" {
	for what in store side names; do
		campaign --program "$top/bsmtp" --plant $what --places 50
	done
}
