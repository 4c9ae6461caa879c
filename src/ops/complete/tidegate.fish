# Completion of tidegate for fish. The program that is typed says itself what can stand at the cursor.

function __tidegate_complete
    set --local words (commandline --current-process --tokenize --cut-at-cursor)
    set --local program (string replace --regex '^~/' "$HOME/" -- $words[1])
    type --query -- $program; or set program tidegate
    type --query -- $program; or return
    env _TIDEGATE_COMPLETE=fish $program -- $words (commandline --current-token --cut-at-cursor) 2>/dev/null
end

complete --command tidegate --no-files --keep-order --arguments '(__tidegate_complete)'
